"""Memory for agents that speak the Model Context Protocol: six tools over one store. Needs the extra `mcp`."""
