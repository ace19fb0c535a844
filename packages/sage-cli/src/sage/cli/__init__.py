"""The command line; it controls engines only over the gateway's HTTP interface."""
