"""Options by the names that users of timm, torchvision, Lightning and Hugging Face type."""

from __future__ import annotations

import difflib
from collections.abc import Collection

# By what is meant: our options, of which a command has some, and the other names.
_MEANINGS: dict[tuple[str, ...], str] = {
    ("arch",): "model model-name network net backbone architecture model-name-or-path",
    (
        "data",
    ): "data-dir data-path data-root dataset dataset-dir dataset-path root train-dir val-dir "
    "images-dir",
    (
        "output",
    ): "output-dir outdir out-dir out save-dir savedir save-path log-dir logdir run-dir exp-dir "
    "work-dir workdir default-root-dir experiment-dir results-dir",
    ("lr",): "learning-rate learningrate base-lr lrate init-lr lr-base",
    ("lr-decay",): "lr-scheduler lr-scheduler-type scheduler lr-schedule lr-policy",
    ("warmup",): "lr-warmup-epochs warmup-epoch lr-warmup warmup-steps warmup-ratio",
    (
        "epochs",
    ): "epoch num-epochs n-epochs num-train-epochs max-epochs max-epoch total-epochs nb-epochs",
    (
        "batch-size",
    ): "batch bs batchsize train-batch-size per-device-train-batch-size mini-batch-size "
    "eval-batch-size val-batch-size validation-batch-size max-batch-size",
    (
        "accumulate",
    ): "gradient-accumulation-steps accumulate-grad-batches accum-iter accum-steps grad-accum",
    ("clip-grad",): "max-grad-norm gradient-clip-val grad-clip clip grad-clip-norm clip-norm",
    ("weight-decay",): "l2 weightdecay",
    ("opt",): "optimizer optim",
    ("ema",): "model-ema ema-decay use-ema",
    (
        "sizes",
        "size",
    ): "img-size image-size input-size imgsz resolution resolutions size sizes "
    "train-crop-size val-crop-size crop-size res",
    ("num-classes",): "nb-classes n-classes classes nclasses",
    (
        "workers",
    ): "num-workers n-workers nworkers nb-workers dataloader-num-workers threads num-threads",
    ("pretrained",): "weights init-weights finetune finetune-from load-weights checkpoint-path "
    "from-pretrained warm-start",
    (
        "resume",
    ): "resume-from resume-from-checkpoint ckpt ckpt-path load load-checkpoint resume-path",
    ("evaluate",): "eval eval-only test test-only validate validate-only do-eval only-eval",
    (
        "amp",
        "dtype",
    ): "precision mixed-precision fp16 bf16 half use-amp amp-dtype bfloat16 autocast",
    ("compile",): "torchcompile torch-compile",
    ("recompute",): "grad-checkpointing gradient-checkpointing activation-checkpointing",
    ("teacher",): "teacher-model teacher-path teacher-arch teacher-name kd-model-name",
    ("teacher-temperature",): "kd-temperature distillation-tau distill-temperature",
    ("teacher-weight",): "distillation-alpha kd-alpha kd-weight distill-loss-weight",
    ("seed",): "random-seed manual-seed rng-seed",
    ("device",): "accelerator use-cuda cuda no-cuda cpu use-cpu",
    ("deterministic",): "cudnn-deterministic",
    ("auto-augment",): "autoaugment randaug rand-augment augment trivial-augment",
    ("ra-magnitude",): "randaug-magnitude rand-magnitude",
    ("drop-path",): "drop-path-rate droppath stochastic-depth drop-connect drop-connect-rate",
    ("layer-decay",): "layer-wise-decay layerwise-lr-decay layer-lr-decay llrd lr-layer-decay",
    ("norm-lr-mult",): "norm-lr-scale norm-lr-factor bn-lr-mult bn-lr-scale bn-lr-factor",
    ("random-erase",): "random-erasing re-prob erase-prob random-erase-prob",
    ("ra-reps",): "ra-sampler repeated-aug repeat-aug repeated-augmentation",
    ("mixup",): "mix-up",
    ("cutmix",): "cut-mix",
    ("label-smoothing",): "label-smoothing-factor labelsmoothing ls",
    ("kd",): "distillation distill use-kd",
    (
        "checkpoint-every",
    ): "save-every save-steps save-interval save-freq checkpoint-interval ckpt-every "
    "recovery-interval checkpoint-freq",
    ("keep",): "checkpoint-hist save-total-limit keep-last save-top-k",
    (
        "log-interval",
    ): "log-every log-freq logging-steps log-every-n-steps print-every print-interval",
    ("wandb",): "report-to use-wandb log-wandb logger",
    ("wandb-project",): "project project-name",
    ("wandb-name",): "run-name experiment exp-name experiment-name wandb-run-name name",
    ("timeout",): "ddp-timeout",
    ("sync-bn",): "sync-batchnorm syncbn dist-bn",
    ("profile",): "profiler",
    ("prefetch",): "prefetch-factor num-prefetch",
    ("top",): "topk top-k k",
    ("confidence",): "conf threshold conf-thres confidence-threshold",
    ("budget-ms",): "budget latency-budget max-latency latency",
    ("deadline-ms",): "deadline latency-slo slo",
    ("fold",): "fuse fuse-bn fold-bn",
    ("target-ms",): "latency-target max-latency target-latency",
    ("target-top1",): "target-accuracy min-accuracy target-acc accuracy",
    ("format",): "type export-format to",
    ("json",): "as-json output-json",
    ("port",): "server-port",
    ("host",): "server-name bind address ip",
}
# Verbs by other names.
VERBS = {
    "train": "fit finetune fine-tune run",
    "evaluate": "test validate val",
    "predict": "infer inference classify",
    "report": "compare",
    "release": "publish push",
    "list": "ls models networks",
}
_TORCHRUN = (
    "n-gpu gpus num-gpus gpu ngpus gpu-ids gpu-id devices nproc nproc-per-node num-processes world-size "
    "nnodes num-nodes nodes rank local-rank dist-url dist-backend multiprocessing-distributed distributed "
    "ddp strategy"
)
BY_LAUNCHER = (
    "torchrun starts one process a GPU, as `torchrun --nproc-per-node 8 -m rsnet train`; "
    "CUDA_VISIBLE_DEVICES chooses them"
)


def advice(flag: str, known: Collection[str]) -> str:
    """Return what a command may have meant by a flag that it does not know. known: its flags."""
    name = flag.lstrip("-").replace("_", "-").lower()
    for without in (name, name.removeprefix("no-")):
        for ours, others in _MEANINGS.items():
            if without in others.split():
                near = [f"--{one}" for one in ours if f"--{one}" in known]
                if near:
                    return f"did you mean {near[0]}?"
    if name in _TORCHRUN.split() and "--arch" in known:
        return BY_LAUNCHER
    near = [k for k in known if k.startswith(f"--{name}") and len(name) > 1]
    near = near or difflib.get_close_matches(f"--{name}", known, n=1)
    return f"did you mean {near[0]}?" if near else "--help lists all options"
