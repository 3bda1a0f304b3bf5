"""What a model has memorised: canaries and documents that can be got out of it, in every format that it is stored in."""
