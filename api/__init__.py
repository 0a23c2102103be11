"""The web service: OpenAI's files, fine-tuning and models routes, and a dashboard. Never imports torch."""
