"""From an MR to a synthetic CT: sampling, the pipeline around it, the input guard and the record."""
