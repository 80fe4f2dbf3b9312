"""The shapes of OpenAI's API: requests, responses, errors."""
