"""The options of what is trained, by topic; those of how it is run: `run_topics`. Imports no torch.

An option of type `... | Unset` may be left unset on the command line: in `TrainConfig` Unset is None. In
`rsnet.config.resolve.ResolvedConfig`, which fills it in from the checkpoint or the recipe, it is Never.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, TypeVar

from tyro.conf import arg

from rsnet.config.model_config import Mode, NormalizeName
from rsnet.config.optimizers import OptName
from rsnet.config.recipes import RecipeName

AutoAugmentOption = Literal["none", "trivial", "rand"]

DEFAULT_ARCH = "parallel_resnet50"
# Per process. Five ResNet-50 graphs of 32 images keep 4 GB, of 256 images 30 GB (bfloat16).
DEFAULT_BATCH_SIZE = {"cuda": 256, "cpu": 32}

Unset = TypeVar("Unset")
UNSET: Any = None


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Generic[Unset]):
    """Network."""

    arch: Annotated[str | Unset, arg(aliases=("-a",), metavar="NAME")] = UNSET
    """Network, by torchvision's name or as timm/NAME; `rsnet list` has them all. Unset: parallel_resnet50."""

    sizes: Annotated[tuple[int, ...] | Unset, arg(metavar="INT [INT ...]")] = UNSET
    """Input sizes in pixels. Unset: 224 192 160 128 96."""

    num_classes: Annotated[int | None, arg(metavar="INT")] = None
    """Outputs of the network. Unset: the classes of the data."""

    width_mult: float = 1.0
    """Factor of the layers' widths (MobileNetV2 and ResNets up to 50 only)."""

    stem: Annotated[Literal["imagenet", "small"] | Unset, arg(metavar="{imagenet,small}")] = UNSET
    """First layer; small: 3x3, stride 1, no pooling, for images of about 32 pixels. Unset: imagenet."""

    norm: Annotated[Literal["private", "shared"] | Unset, arg(metavar="{private,shared}")] = UNSET
    """BatchNorm of each size its own, or one shared by all sizes, as a baseline. Unset: private."""

    blurpool: bool = False
    """Blur before strided convolutions (antialiasing)."""

    mode: Annotated[Mode | Unset, arg(metavar="{resnet,preact,preact_typeA}")] = UNSET
    """resnet: --arch as it is; preact, preact_typeA: a pre-activation ResNet, for --qa. Unset: resnet."""

    qw: Annotated[int | Unset, arg(metavar="BITS")] = UNSET
    """Bits of the weights of all convolutions but the first, 1 to 8. Unset: 32, not quantized."""

    qa: Annotated[int | Unset, arg(metavar="BITS")] = UNSET
    """Bits of the activations, 1 to 8. Unset: 32, not quantized."""

    fixed_qa: bool | Unset = UNSET
    """Fit the quantization levels of activations to the largest size alone. Unset: off."""

    tf_padding: bool = False
    """Pad strided layers as TensorFlow does; quantized networks of the original code need it."""

    pretrained: Annotated[
        str | None,
        arg(aliases=("--initial-checkpoint", "--init-from"), metavar="default|NAME|PATH"),
    ] = None
    """Start from trained weights: of a run directory, checkpoint, release or file of the original code; or of
    the ordinary, single-resolution network, its library's or a file. Unset: random initialisation."""

    drop_path: Annotated[
        float | None, arg(aliases=("--stochastic-depth-prob",), metavar="FLOAT")
    ] = None
    """Probability that training skips the last block's residual branch for an image; it falls linearly to 0
    at the first block (stochastic depth). Unset: the library's, which is 0, of torchvision's EfficientNets
    0.2.
    """

    freeze: Annotated[str | Unset, arg(metavar="none|backbone|LAYER")] = UNSET
    """Weights to keep fixed: backbone, all but the classifier; or all up to and including the layer of this
    name. BatchNorm always learns. Unset: none.
    """


@dataclass(frozen=True, kw_only=True)
class DataOptions(Generic[Unset]):
    """Data and batch size."""

    data: Annotated[str, arg(aliases=("-d",), metavar="DIR")]
    """Folder with train/CLASS/IMAGE and val/CLASS/IMAGE, table of paths (.csv, .jsonl, .parquet), or tar
    shards ('shards/{train,val}-*.tar'), also in object storage (s3://...); for FFCV a folder with train.beton
    and val.beton."""

    val_data: Annotated[str | None, arg(metavar="DIR")] = None
    """Separate validation images, in place of those in --data."""

    val_fraction: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Share of the training images to hold out for validation, chosen by a hash of their names."""

    class_weights: Annotated[str | None, arg(metavar="balanced|FILE|none")] = None
    """Weights of the classes in the loss: balanced, the inverse of their images; or a JSON file,
    {"CLASS": WEIGHT}. A table's column weight counts in any case. Unset: none."""

    balanced_sampling: bool | Unset = UNSET
    """Draw the same number of images of every class in an epoch; images of small classes repeat, with new
    crops. Unset: off.
    """

    normalize: Annotated[
        NormalizeName | Unset, arg(metavar="{imagenet,unit,inception,clip,dpn}")
    ] = UNSET
    """imagenet: ImageNet's mean and std; unit: [0, 1], as in the original; inception, clip, dpn: timm's of
    these names. Unset: what --pretrained was trained with, else imagenet."""

    batch_size: Annotated[int | Unset, arg(aliases=("-b",), metavar="INT")] = UNSET
    """Images per process and step. Unset: 256 on a GPU, 32 on a CPU."""

    seed: Annotated[int | Unset, arg(metavar="INT")] = UNSET
    """Seed of initialisation, order, crops and flips. Unset: 0."""


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions(Generic[Unset]):
    """Optimizer."""

    lr: Annotated[float | Unset, arg(metavar="FLOAT")] = UNSET
    """Learning rate. Unset: the recipe's 0.1 (strong 0.125, MobileNets 0.05; see --opt) times global
    batch / 256."""

    momentum: Annotated[float | Unset, arg(metavar="FLOAT")] = UNSET
    """Momentum of SGD and Muon; beta1 of AdamW and LAMB. Unset: 0.9."""

    weight_decay: Annotated[float | Unset, arg(aliases=("--wd",), metavar="FLOAT")] = UNSET
    """Weight decay. Unset: the recipe's (1e-4, MobileNets 4e-5, quantized 5e-5; strong 2e-5; see --opt)."""

    opt: Annotated[
        OptName | Unset, arg(aliases=("--sgd",), metavar="{plain,nesterov,adamw,lamb,muon}")
    ] = UNSET
    """Optimizer: SGD with plain or Nesterov's momentum; or, with a learning rate per 256 images and a weight
    decay of their own, AdamW (2.5e-4, 0.05), and timm's LAMB (6.25e-4, 0.02) and Muon (2.5e-4, 0.05). Unset:
    plain; nesterov for quantized networks."""

    decay: Annotated[Literal["all", "weights"] | Unset, arg(metavar="{all,weights}")] = UNSET
    """Parameters with weight decay; weights: none on norm layers, biases and alpha. --norm-weight-decay is
    the same as all, --no-norm-weight-decay as weights. Unset: the recipe's (paper all, others and quantized
    weights)."""

    layer_decay: Annotated[float | Unset, arg(metavar="FLOAT")] = UNSET
    """Factor of the learning rate from a layer to the one before it, to fine-tune; the classifier has --lr.
    Unset: 1, the same rate for all."""

    norm_lr_mult: Annotated[float | Unset, arg(metavar="FLOAT")] = UNSET
    """Factor of BatchNorm's learning rate. A private BatchNorm gets the gradient of its own size, shared
    weights the sum over all sizes; the number of sizes as the factor compensates for SGD; the steps of
    adamw, lamb and muon do not depend on a gradient's size. Unset: 1, as in the paper.
    """

    accumulate: Annotated[int | Unset, arg(aliases=("--grad-accum-steps",), metavar="INT")] = UNSET
    """Batches whose gradients make up one update. Unset: 1; for a run that resumes on another number of
    processes, the value that keeps the images per update.
    """

    clip_grad: Annotated[float | Unset, arg(aliases=("--clip-grad-norm",), metavar="FLOAT")] = UNSET
    """Largest norm of the gradients. Unset: 0, no clipping."""

    ema: Annotated[float | Unset, arg(aliases=("--model-ema-decay",), metavar="FLOAT")] = UNSET
    """Decay per update of averaged weights, which are then what is evaluated; 0: no averaging. Unset: the
    recipe's (paper 0, others by epochs and batch size)."""


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions(Generic[Unset]):
    """Recipe, epochs and learning rate schedule."""

    recipe: Annotated[RecipeName | Unset, arg(metavar="{paper,short,strong}")] = UNSET
    """Defaults of options that are not given: the paper's; short, for few epochs; strong, for many epochs
    with strong augmentation. Unset: paper.
    """

    epochs: Annotated[int | Unset, arg(metavar="INT")] = UNSET
    """Epochs of training. Unset: the recipe's (paper and short 120, MobileNets 150; strong 600)."""

    lr_decay: Annotated[
        Literal["cosine", "step", "linear", "schedule"] | Unset,
        arg(aliases=("--sched",), metavar="{cosine,step,linear,schedule}"),
    ] = UNSET
    """cosine, also cos, and linear fall to zero by iteration; step and schedule by --gamma at epochs. Unset:
    the recipe's (cosine; quantized: schedule; short: linear up to 87 epochs)."""

    step: Annotated[int | Unset, arg(metavar="INT")] = UNSET
    """Epochs between decays of --lr-decay step. Unset: 30."""

    schedule: Annotated[tuple[int, ...] | Unset, arg(metavar="INT [INT ...]")] = UNSET
    """Epochs of the decays of --lr-decay schedule. Unset: 30 60 85 95 105."""

    gamma: Annotated[float | Unset, arg(metavar="FLOAT")] = UNSET
    """Factor of a decay of step and schedule. Unset: 0.1."""

    warmup: Annotated[int | Unset, arg(aliases=("--warmup-epochs",), metavar="INT")] = UNSET
    """Epochs of linear warm-up. Unset: the recipe's (paper 0, short up to 5, strong 5)."""


@dataclass(frozen=True, kw_only=True)
class AugmentationOptions(Generic[Unset]):
    """Augmentation of images and labels."""

    flip: Annotated[
        Literal["independent", "shared"] | Unset, arg(metavar="{independent,shared}")
    ] = UNSET
    """Each size draws its own flip, as in the original, or all share one. Unset: independent; strong
    shared."""

    auto_augment: Annotated[
        AutoAugmentOption | Unset, arg(aliases=("--aa",), metavar="{none,trivial,rand}")
    ] = UNSET
    """torchvision's TrivialAugmentWide (also ta_wide), or its RandAugment of two operations (also ra), on the
    crop. Unset: none; strong trivial."""

    ra_magnitude: Annotated[int | Unset, arg(metavar="INT")] = UNSET
    """Magnitude of RandAugment, 0 to 30. Unset: 9."""

    mixup: Annotated[float | Unset, arg(aliases=("--mixup-alpha",), metavar="FLOAT")] = UNSET
    """Alpha of mixup, which mixes alike at all sizes. Unset: 0, off; strong 0.2."""

    cutmix: Annotated[float | Unset, arg(aliases=("--cutmix-alpha",), metavar="FLOAT")] = UNSET
    """Alpha of CutMix, which pastes the same box at all sizes. Unset: 0, off; strong 1."""

    random_erase: Annotated[float | Unset, arg(aliases=("--reprob",), metavar="FLOAT")] = UNSET
    """Share of the images of which one box is erased, set to the mean, the same part of the picture at all
    sizes. Unset: 0; strong 0.1."""

    ra_reps: Annotated[int | Unset, arg(aliases=("--aug-repeats",), metavar="INT")] = UNSET
    """Crops of an image in a step, over all processes (repeated augmentation); an epoch then has fewer images
    and stays as long. Unset: 1; strong 4."""

    train_size_scale: Annotated[float | Unset, arg(metavar="FLOAT")] = UNSET
    """Train on images of --sizes times this (FixRes), to the nearest multiple of 4; evaluate at --sizes.
    Unset: 1; strong 176/224."""

    label_smoothing: Annotated[float | Unset, arg(aliases=("--smoothing",), metavar="FLOAT")] = (
        UNSET
    )
    """Share of a label that is spread over all classes. Unset: the recipe's (paper 0, others 0.1)."""

    loss: Annotated[Literal["ce", "bce"] | Unset, arg(metavar="{ce,bce}")] = UNSET
    """ce: cross-entropy; bce, also --bce-loss: timm's binary cross-entropy, the mean over the classes, with
    distillation by sigmoid; its gradients are smaller, so adjust --lr. Unset: ce."""

    bce_target_thresh: Annotated[float | Unset, arg(metavar="FLOAT")] = UNSET
    """Share of a mixed or smoothed label above which --loss bce takes it for 1, else for 0. Unset: 0, the
    shares themselves."""


@dataclass(frozen=True, kw_only=True)
class DistillationOptions(Generic[Unset]):
    """Distillation between the sizes, and from a teacher."""

    kd: bool | Unset = UNSET
    """Distil from the ensemble (and the larger sizes) to each size. Unset: on."""

    kd_type: Annotated[
        Literal["ens_topdown", "ens"] | Unset, arg(aliases=("-t",), metavar="{ens_topdown,ens}")
    ] = UNSET
    """ens_topdown: ensemble and larger sizes teach; ens: the ensemble alone. Unset: ens_topdown."""

    teacher: Annotated[str | Unset, arg(metavar="NAME|RUN|FILE|RELEASE|none")] = UNSET
    """Frozen network that teaches every size, too: an RS-Net (run directory, checkpoint, release), or a
    network with its library's weights, by torchvision's name or as timm/NAME. Unset: none."""

    teacher_size: Annotated[str | None, arg(metavar="INT|ensemble")] = None
    """Size in pixels at which the teacher sees the crop; ensemble: all sizes of an RS-Net, whose ensemble
    teaches. Unset: its own, of an RS-Net the largest."""

    teacher_weight: Annotated[float | Unset, arg(metavar="FLOAT")] = UNSET
    """Weight of the teacher's distillation in the loss. Unset: 1."""

    teacher_temperature: Annotated[float | Unset, arg(metavar="FLOAT")] = UNSET
    """Temperature of the teacher's distillation; the loss is multiplied by its square. Unset: 1."""

    sizes_per_step: Annotated[int | Unset, arg(metavar="INT")] = UNSET
    """Sizes in a step: the largest and others, drawn at random. Unset: all, as in the paper."""

    size_schedule: Annotated[
        tuple[str, ...] | Unset, arg(metavar="EPOCHS:SIZES [EPOCHS:SIZES ...]")
    ] = UNSET
    """Sizes to train from each epoch on, as in 0:128 40:160,128 80:all (progressive resizing); with
    --sizes-per-step, as many are drawn from each part. Unset: 0:all.
    """
