"""Networks whose outputs are images: segmentation, reconstruction, resolution, physiology."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import draw
from .model import model


class DoubleConv(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class Up(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, bilinear: bool) -> None:
        super().__init__()
        if bilinear:
            self.up: nn.Module = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            self.conv = DoubleConv(in_channels + out_channels, out_channels)
        else:
            self.up = nn.ConvTranspose2d(in_channels, in_channels // 2, kernel_size=2, stride=2)
            self.conv = DoubleConv(in_channels // 2 + out_channels, out_channels)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        x1 = self.up(x1)
        dy, dx = x2.size()[2] - x1.size()[2], x2.size()[3] - x1.size()[3]
        x1 = F.pad(x1, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return self.conv(torch.cat([x2, x1], dim=1))


class UNet(nn.Module):
    """Ronneberger et al., arXiv 1505.04597."""

    def __init__(self, classes: int, bilinear: bool) -> None:
        super().__init__()
        self.inc = DoubleConv(1, 4)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(4, 6))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(6, 8))
        self.up1, self.up2 = Up(8, 6, bilinear), Up(6, 4, bilinear)
        self.outc = nn.Conv2d(4, classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        return self.outc(self.up2(self.up1(x3, x2), x1))


def dice(outputs: Tensor, targets: Tensor, smooth: float = 1.0) -> Tensor:
    """One minus the overlap of masks, sample by sample (arXiv 1606.04797)."""
    p, t = torch.sigmoid(outputs).flatten(1), targets.flatten(1)
    intersection = (p * t).sum(1)
    return (1 - (2 * intersection + smooth) / (p.sum(1) + t.sum(1) + smooth)).mean()


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1),
            nn.ReLU(True),
            nn.Conv2d(4, 6, 3, stride=2, padding=1),
            nn.ReLU(True),
        )
        self.bottleneck, self.widen = nn.Linear(24, 6), nn.Linear(6, 24)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1),
            nn.ReLU(True),
            nn.ConvTranspose2d(4, 1, 4, stride=2, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        z = self.bottleneck(self.encoder(x).flatten(1))
        return self.decoder(F.relu(self.widen(z)).view(-1, 6, 2, 2))


class ESPCN(nn.Module):
    """Sub-pixel convolution (arXiv 1609.05158), added to a bicubic-free baseline: the image repeated."""

    def __init__(self, scale: int = 2) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 4, 3, padding=1)
        self.conv3, self.pixel_shuffle = nn.Conv2d(4, scale**2, 3, padding=1), nn.PixelShuffle(scale)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.conv2(torch.tanh(self.conv1(x))))
        y = self.pixel_shuffle(self.conv3(y))
        return y + F.interpolate(x, scale_factor=self.scale, mode="bilinear", align_corners=False)


def charbonnier(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.sqrt((outputs - targets) ** 2 + 1e-6).mean()


class FCN8(nn.Module):
    """Fully convolutional, with skips (arXiv 1411.4038); outputs in a dictionary."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.stage2 = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.score1, self.score2 = nn.Conv2d(4, classes, 1), nn.Conv2d(6, classes, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        size = x.shape[-2:]
        a = self.stage1(x)
        b = self.stage2(a)
        fused = self.score1(a) + F.interpolate(self.score2(b), size=a.shape[-2:], mode="nearest")
        return {"out": F.interpolate(fused, size=size, mode="bilinear", align_corners=False)}


def attention_mask(x: Tensor) -> Tensor:
    """TS-CAN's: all positions of a channel sum to half their number."""
    total = torch.sum(torch.sum(x, dim=2, keepdim=True), dim=3, keepdim=True)
    shape = x.size()
    return x / total * shape[2] * shape[3] * 0.5


class TemporalShift(nn.Module):
    """Channels move one frame back or forth (arXiv 1811.08383)."""

    def __init__(self, segments: int, fold_div: int = 3) -> None:
        super().__init__()
        self.segments, self.fold_div = segments, fold_div

    def forward(self, x: Tensor) -> Tensor:
        nt, c, h, w = x.size()
        x = x.view(nt // self.segments, self.segments, c, h, w)
        fold = c // self.fold_div
        out = torch.zeros_like(x)
        out[:, :-1, :fold] = x[:, 1:, :fold]
        out[:, 1:, fold : 2 * fold] = x[:, :-1, fold : 2 * fold]
        out[:, :, 2 * fold :] = x[:, :, 2 * fold :]
        return out.view(nt, c, h, w)


class TSCAN(nn.Module):
    """MetaPhys's network (arXiv 2010.01773): motion gated by appearance, frames shifted in time."""

    def __init__(self, frames: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.tsm1, self.tsm2 = TemporalShift(frames), TemporalShift(frames)
        self.motion1, self.motion2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3)
        self.appearance1, self.appearance2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3)
        self.gate = nn.Conv2d(6, 1, 1)
        self.pool, self.dropout = nn.AvgPool2d(2), nn.Dropout(dropout)
        self.dense1, self.dense2 = nn.Linear(54, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, frames = x.shape[:2]
        x = x.view(n * frames, 6, 8, 8)
        motion, raw = x[:, :3], x[:, 3:]
        d = torch.tanh(self.motion1(self.tsm1(motion)))
        d = torch.tanh(self.motion2(self.tsm2(d)))
        r = torch.tanh(self.appearance2(torch.tanh(self.appearance1(raw))))
        gated = d * attention_mask(torch.sigmoid(self.gate(r)))
        flat = self.dropout(self.pool(gated)).view(n * frames, -1)
        return self.dense2(torch.tanh(self.dense1(flat))).view(n, frames)


def pixelwise(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy and overlap, as segmentation mixes them."""
    p = outputs.softmax(1)[:, 1]
    overlap = 2 * (p * (targets == 1)).sum() / (p.sum() + (targets == 1).sum() + 1)
    return F.cross_entropy(outputs, targets) + 1 - overlap


def of_output(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs["out"], targets, ignore_index=3)


GREY = (1, 8, 8)

CASES = (
    model("unet", lambda: UNet(3, bilinear=False), (1, 8, 8), draw.whole(3, 8, 8), "cross_entropy", steps=1),
    model("unet-mixed-loss", lambda: UNet(2, bilinear=True), (1, 8, 8), draw.whole(2, 8, 8), pixelwise, steps=1),
    model("unet-bilinear-dice", lambda: UNet(1, bilinear=True), (1, 9, 8), draw.bits(1, 9, 8), dice, steps=1),
    model("autoencoder", Autoencoder, draw.uniform(0, 1, *GREY), draw.uniform(0, 1, *GREY), nn.BCELoss()),
    model("super-resolution", ESPCN, (1, 6, 6), (1, 12, 12), charbonnier),
    model("fcn-8", lambda: FCN8(3), GREY, draw.whole(4, 8, 8), of_output),
    model("ts-can", lambda: TSCAN(4), (4, 6, 8, 8), (4,), "mse", steps=1),
    model("ts-can-dropout", lambda: TSCAN(4, 0.25), (4, 6, 8, 8), (4,), "mse", steps=1),
)
