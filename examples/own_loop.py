"""Make a torchvision or timm network switchable, and train it in a loop of your own.

    python examples/own_loop.py DATA [NETWORK]

DATA: image folder, DATA/train/CLASS/*.jpg and DATA/val/CLASS/*.jpg. NETWORK: a name of torchvision's, as
resnet18 (if not given), or of timm's, as timm/resnet18.

Expected: a line per epoch with the loss and top-1 at each size, of one network. Time and accuracy have not
been measured. `python -m pipelines demo --output demo/data` makes a small DATA to try it on.
"""

from __future__ import annotations

import sys

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from rsnet.losses import loss_terms
from rsnet.models.switchable import ResolutionSwitchable

SIZES = (64, 48, 32)  # pixels; the images are cropped at the first size
EPOCHS, BATCH = 3, 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, in RGB
TO_TENSOR = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
TRAIN = v2.Compose([v2.RandomResizedCrop(SIZES[0]), v2.RandomHorizontalFlip(), *TO_TENSOR])
VAL = v2.Compose([v2.Resize(int(SIZES[0] / 0.875)), v2.CenterCrop(SIZES[0]), *TO_TENSOR])


def main(data: str, name: str = "resnet18") -> ResolutionSwitchable:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = ImageFolder(f"{data}/train", TRAIN)
    train = DataLoader(folder, BATCH, shuffle=True, drop_last=True)
    val = DataLoader(ImageFolder(f"{data}/val", VAL), BATCH)

    # Any network with BatchNorm. Each BatchNorm becomes three private ones; all other weights are shared.
    model = ResolutionSwitchable(make_network(name, len(folder.classes)), SIZES).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(train))

    for epoch in range(EPOCHS):
        model.train()
        for images, labels in train:
            # The same crop at each size, the largest first; one backward for all of them.
            logits = model.forward_all([resize(images.to(device), size) for size in SIZES])
            # Cross-entropy of each size and of the ensemble, whose weights are `alpha`, and the distillation
            # from the ensemble and the larger sizes. `terms` has all of them by name, to log.
            terms = loss_terms(logits, labels.to(device), model.alpha, SIZES, "ens_topdown")
            optimizer.zero_grad()
            terms["total"].backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        shown = ", ".join(
            f"{s}: {top1:.1f} %" for s, top1 in accuracies(model, val, device).items()
        )
        print(f"epoch {epoch + 1}: loss {terms['total']:.3f}, top-1 at {shown}")
    return model


@torch.no_grad()
def accuracies(
    model: ResolutionSwitchable, val: DataLoader[tuple[Tensor, Tensor]], device: str
) -> dict[int, float]:
    """Return top-1 in percent by size, of the same weights."""
    model.eval()
    right, count = dict.fromkeys(SIZES, 0), 0
    for images, labels in val:
        count += len(labels)
        for size in SIZES:
            # The size of the images chooses the BatchNorm.
            answers = model(resize(images.to(device), size)).argmax(dim=1).cpu()
            right[size] += int((answers == labels).sum())
    return {size: 100 * n / count for size, n in right.items()}


def resize(images: Tensor, size: int) -> Tensor:
    """(N, 3, s, s) -> (N, 3, size, size), antialiased."""
    resized: Tensor = v2.functional.resize(images, [size, size], antialias=True)
    return resized


def make_network(name: str, num_classes: int) -> nn.Module:
    """Return an ordinary network, randomly initialised."""
    network: nn.Module
    if name.startswith("timm/"):
        import timm

        network = timm.create_model(name.removeprefix("timm/"), num_classes=num_classes)
    else:
        network = torchvision.models.get_model(name, num_classes=num_classes)
    return network


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
