"""The experts' own layers: contract, reference, inputs, judge and kernels of moe.experts."""
