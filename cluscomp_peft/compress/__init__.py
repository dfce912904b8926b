"""From dense weights to codes: which layers, how many bits for each, calibration text, clustering."""
