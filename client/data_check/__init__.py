"""Whether a folder of images is ready for training: what `fedqc data check` finds, says and draws."""
