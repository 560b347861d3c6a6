"""The sandbox: an offline Norce Checkout, a stand-in for Jetshop, scenarios and the demo. Not part of the product."""
