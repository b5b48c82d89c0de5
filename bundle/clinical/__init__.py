"""Commands that turn a synthetic CT into what planning systems and PET reconstructions read, and compare it there."""
