"""RegNetY in PyTorch, on the tensors of an official file as they are: the other side of `--verify` for a teacher."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F


def forward(state: Mapping[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """[B, C] of images [B, channels, size, size]; batch normalisation with the stored statistics."""

    def conv(x: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
        weight = state[f"{name}.conv.weight"]
        groups = x.shape[1] // weight.shape[1]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)
        mean, var, scale, bias = (state[f"{name}.bn.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, scale, bias)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"])

    x = conv(images, "stem", 2).relu()
    for name in dict.fromkeys(n.rsplit(".conv1.", 1)[0] for n in state if ".conv1." in n):
        stride = 2 if name.endswith(".b1") else 1
        y = conv(conv(x, f"{name}.conv1").relu(), f"{name}.conv2", stride).relu()
        squeezed = linear(y.mean((2, 3), keepdim=True), f"{name}.se.fc1").relu()
        y = conv(y * linear(squeezed, f"{name}.se.fc2").sigmoid(), f"{name}.conv3")
        x = (y + (conv(x, f"{name}.downsample", stride) if f"{name}.downsample.conv.weight" in state else x)).relu()
    return F.linear(x.mean((2, 3)), state["head.fc.weight"], state["head.fc.bias"])
