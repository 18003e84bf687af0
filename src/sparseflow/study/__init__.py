"""From training choices to hardware cost: train a grid of networks, count spikes, measure and predict their cost."""
