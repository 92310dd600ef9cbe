"""ResNets for 32-px images, as `timm` networks: a 3x3 stem without stride or pooling.

The usual change for CIFAR (He et al. 2016, Sec. 4.2); the rest is timm's ResNet. Sizes are set so
that `resnet_mini` and `resnet_nano` have a ViT's parameters within 10 % and FLOPs within 25 %.
"""

from timm.models import register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn


@register_model
def small_resnet(pretrained: bool = False, layers=(2, 2, 2, 2), channels=(64, 128, 256, 512),
                 **options) -> ResNet:
    """ResNet of basic blocks, [B, 3, S, S] -> [B, num_classes], or [B, channels[3]] for 0."""
    if pretrained:
        raise ValueError("small_resnet has no published weights; pretrain it with "
                         "python -m experiments pretrain resnet_mini.")
    for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        options.pop(key, None)  # of timm's factory
    network = ResNet(BasicBlock, layers, channels=channels, **options)
    network.conv1 = nn.Conv2d(3, network.conv1.out_channels, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return network
