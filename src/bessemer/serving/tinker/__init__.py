"""The Tinker API: clients send data and losses, the server holds the weights, trains adapters of them and samples from them."""
