"""Inference from MR to synthetic CT: sampling, the pipeline around it, the input guard and the record."""
