"""Where volumes come from: folders, phantoms, patches for training, probes for the monitor.

The only door to TorchIO; everything beyond it sees tensors and ``Probe`` objects.
"""
