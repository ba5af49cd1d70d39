"""The Hub: who we are there, what is fetched from it, and what goes up."""
