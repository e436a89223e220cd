"""Any adapter, looked at without trust: who reads it how, what it is made of, and how it is mended."""
