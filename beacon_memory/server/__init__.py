"""An OpenAI-compatible server with memories: `run.serve`. It needs the extra `server`."""
