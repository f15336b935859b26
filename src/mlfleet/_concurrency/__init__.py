"""The few tools that everything async here is made of."""
