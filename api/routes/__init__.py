"""Routes by noun. Each router names the dependency that guards it; only health, sign-in and static files are open."""
