"""A small spiking ResNet trained on scikit-learn's digits: data, network, training script and checkpoint."""
