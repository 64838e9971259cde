# For machines with UEFI firmware: SystemReady boards, QEMU's `virt` machine, and PCs.
{ pkgs, ... }:

{
  imports = [ ./base.nix ];

  boot = {
    kernelParams = [
      "console=tty0"
      # The last one is where the boot's messages and the login prompt go.
      (
        if pkgs.stdenv.hostPlatform.isAarch64 then "console=ttyAMA0,115200n8" else "console=ttyS0,115200n8"
      )
    ];
    initrd.availableKernelModules = [
      "ahci"
      "nvme"
      "sd_mod"
      "usb_storage"
      "virtio_blk"
      "virtio_pci"
      "virtio_scsi"
      "xhci_pci"
    ];
  };
}
