"""Networks and their weights. Each model family is one package that implements `Policy`."""
