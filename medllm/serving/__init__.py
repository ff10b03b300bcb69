"""The contract a model is served by: what training taught of where a text ends, what is published, what a server keeps."""
