"""The command line. It controls engines only through the gateway's HTTP interface."""
