"""Reading and writing volumes, body masks, Hounsfield units, transforms and training pairs."""
