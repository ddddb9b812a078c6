"""Check whether a folder of images is ready for training (`fedqc data check`)."""
