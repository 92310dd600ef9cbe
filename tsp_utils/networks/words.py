"""What figures say for the names of the library, and the colours of backbones."""

BACKBONE_COLORS = {
    "pixels": "#8c8c8c", "vit_mini_random": "#c49c6b", "patch_kmeans": "#3a78a8",
    "invariant_patches": "#c2549d", "vit_nano_cpu": "#7d5ba6",
    "vit_nano_cpu_cifar10_4k": "#e0a03b", "vit_pico_cpu": "#b79fd0",
    "resnet_nano_cpu": "#4f9a94", "resnet_contrast_cifar10": "#b03a2e",
    "dino_resnet50": "#6a9f58", "dino_vits16": "#d1605e", "dino_vitb16": "#967662",
}
WORDS = {
    "vit_mini_random": "untrained ViT", "patch_kmeans": "patches (K-means)",
    "invariant_patches": "patches (invariant)", "vit_nano_cpu": "small ViT",
    "vit_nano_cpu_cifar10_4k": "small ViT, target alone", "vit_pico_cpu": "smaller ViT",
    "resnet_nano_cpu": "small ResNet", "resnet_contrast_cifar10": "ResNet (SimCLR)",
    "dino_resnet50": "ResNet-50", "dino_vits16": "ViT-S/16", "dino_vitb16": "ViT-B/16",
    "cifar10": "CIFAR-10", "stl10": "STL-10", "fashion-mnist": "Fashion-MNIST",
    "cifar100-20": "CIFAR-100-20", "k-means": "K-means", "k-means-20": "K-means, best of 20",
    "spherical k-means": "spherical K-means", "head": "TSP head", "gmm": "Gaussian mixture",
    "tsp consensus": "TSP, consensus", "spectral": "spectral", "secu": "SeCu",
    "1e-4": "rate 1e-4", "1e-5": "rate 1e-5"}


def in_words(name: str) -> str:
    """What a figure says for a backbone, data set or method; a name without words stays."""
    return WORDS.get(name, name)
