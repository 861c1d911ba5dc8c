"""One model that several ranks share (tensor parallelism): what each rank has, its graph, its weights, their runs."""
