mod agreement;
mod bad_input;
mod behaviour;
mod site;
