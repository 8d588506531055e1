"""What an adapter is: format, checks, maths, store and catalog. Knows nothing of HTTP."""
