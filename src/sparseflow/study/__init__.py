"""From training choices to hardware cost: train a grid of networks, count their spikes, measure and predict their cost."""
