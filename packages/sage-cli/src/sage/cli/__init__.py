"""The command line: everything it does goes through the gateway's HTTP."""
