"""snnTorch's convolutional tutorial network, trained on scikit-learn's digits."""
