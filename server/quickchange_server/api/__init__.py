"""The HTTP edge: schemas, routes, streaming. Knows nothing of tensors."""
