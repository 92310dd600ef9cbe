"""Networks: the table of backbones, their weights, and those that timm does not have."""
