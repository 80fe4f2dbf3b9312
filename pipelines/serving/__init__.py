"""What runs inside the Serve application: the engine's host, text, the OpenAI shapes, the deployments."""
