"""The sandbox: an offline Norce Checkout, a stand-in for Jetshop, scenarios and the demo.

It is not part of the product.
"""
