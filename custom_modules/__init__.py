"""What the configs name by ``_target_``: the networks, transforms, losses and inferers of 3D-WLDM."""
