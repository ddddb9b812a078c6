"""Apply a model to images of this hospital (`fedqc predict`): nothing is sent, all output is local."""
