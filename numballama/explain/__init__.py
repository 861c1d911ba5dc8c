"""What a model computes for a text: any value of its graph, each token's probability, attention, the logit lens."""
