"""The gateway: management of engines and OpenAI-compatible inference over HTTP."""
