"""How backbones are made: DINO and its crops, the learning of a dictionary of patches."""
