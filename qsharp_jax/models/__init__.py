"""The networks: configurations, the decoder, the value model on its trunk, and the key-value cache."""
