"""Complete trainings, from raw material to a model that ships, made only of public functions of sdkit."""
