"""Where SGE stands in a model: ResNet blocks and backbones, timm's ResNets, and the gates that can be read there."""
