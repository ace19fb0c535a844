"""The command line, which controls engines only through the gateway's HTTP interface."""
