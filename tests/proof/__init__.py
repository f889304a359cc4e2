"""The instruments of proof, tried on histories and bugs made by hand."""
