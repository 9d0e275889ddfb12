//! [`Links`] over a netlink socket: RTM_GETLINK and RTM_SETLINK with IFLA_VFINFO_LIST (Linux,
//! include/uapi/linux/if_link.h).

use std::io::{self, Error, ErrorKind};

use netlink_packet_core::{
    ErrorMessage, NLM_F_ACK, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
    NlasIterator,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    LinkAttribute, LinkExtentMask, LinkMessage, LinkVfInfo, VfInfo, VfInfoLinkState, VfInfoMac,
    VfInfoRate, VfInfoSpoofCheck, VfInfoTrust, VfInfoVlan, VfLinkState,
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use super::{LinkState, Links, Mac, Setting, VfSettings, Vlan};

/// The attribute of an error that says in words what is wrong (Linux, include/uapi/linux/netlink.h).
const NLMSGERR_ATTR_MSG: u16 = 1;
/// Length of the request's header that an error repeats (`struct nlmsghdr`).
const REQUEST_HEADER: usize = 16;

/// A socket to the kernel's network configuration.
#[derive(Debug)]
pub struct Rtnetlink {
    socket: Socket,
    sequence: u32,
}

impl Rtnetlink {
    /// Opens the socket.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // Old kernels give the number of an error only.
        let _ = socket.set_cap_ack(true).and(socket.set_ext_ack(true));
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Sends a request and gives its answer, which is `None` if it is a mere confirmation.
    fn ask(&mut self, request: RouteNetlinkMessage, flags: u16) -> io::Result<Option<LinkMessage>> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        loop {
            let (bytes, _) = self.socket.recv_from_full()?;
            let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&bytes)
                .map_err(|e| Error::new(ErrorKind::InvalidData, e))?;
            if answer.header.sequence_number != self.sequence {
                continue;
            }
            return match answer.payload {
                NetlinkPayload::Error(error) if error.code.is_some() => Err(in_words(&error)),
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => Ok(Some(link)),
                _ => Ok(None),
            };
        }
    }
}

/// The kernel's refusal, with its own words for the reason if it gives any.
fn in_words(error: &ErrorMessage) -> Error {
    let plain = error.to_io();
    let attributes = error.header.get(REQUEST_HEADER..).unwrap_or_default();
    let text = NlasIterator::new(attributes)
        .filter_map(Result::ok)
        .find(|attribute| attribute.kind() == NLMSGERR_ATTR_MSG)
        .map(|attribute| String::from_utf8_lossy(attribute.value()).into_owned());
    match text {
        // The number alone says that the driver has no such function.
        Some(text) if plain.raw_os_error() != Some(nix::libc::EOPNOTSUPP) => Error::new(
            plain.kind(),
            format!("{} ({plain})", text.trim_end_matches('\0')),
        ),
        _ => plain,
    }
}

fn link(interface: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = interface;
    message
}

impl Links for Rtnetlink {
    fn settings(&mut self, interface: u32) -> io::Result<Vec<(u16, VfSettings)>> {
        let mut message = link(interface);
        message
            .attributes
            .push(LinkAttribute::ExtMask(vec![LinkExtentMask::Vf]));
        let answer = self.ask(RouteNetlinkMessage::GetLink(message), 0)?;
        let attributes = answer.map(|link| link.attributes).unwrap_or_default();
        let functions = attributes
            .into_iter()
            .filter_map(|attribute| match attribute {
                LinkAttribute::VfInfoList(list) => Some(list),
                _ => None,
            });
        Ok(functions
            .flatten()
            .filter_map(|info| parse(&info))
            .collect())
    }

    fn set(&mut self, interface: u32, vf: u16, setting: &Setting) -> io::Result<()> {
        let info = LinkVfInfo(vec![build(vf, setting)]);
        let mut message = link(interface);
        message
            .attributes
            .push(LinkAttribute::VfInfoList(vec![info]));
        self.ask(RouteNetlinkMessage::SetLink(message), NLM_F_ACK)
            .map(drop)
    }
}

/// One setting as the kernel wants it.
fn build(vf: u16, setting: &Setting) -> VfInfo {
    let vf = u32::from(vf);
    match setting {
        Setting::Mac(mac) => VfInfo::Mac(VfInfoMac::new(vf, &mac.0)),
        Setting::Vlan(vlan) => VfInfo::Vlan(VfInfoVlan::new(vf, vlan.id.into(), vlan.qos.into())),
        Setting::Rate { min, max } => VfInfo::Rate(VfInfoRate::new(vf, *min, *max)),
        Setting::Trust(on) => VfInfo::Trust(VfInfoTrust::new(vf, *on)),
        Setting::SpoofCheck(on) => VfInfo::SpoofCheck(VfInfoSpoofCheck::new(vf, *on)),
        Setting::LinkState(state) => {
            let state = match state {
                LinkState::Auto => VfLinkState::Auto,
                LinkState::Enable => VfLinkState::Enable,
                LinkState::Disable => VfLinkState::Disable,
            };
            VfInfo::LinkState(VfInfoLinkState::new(vf, state))
        }
    }
}

/// What the kernel tells about one virtual function, and its number.
fn parse(info: &LinkVfInfo) -> Option<(u16, VfSettings)> {
    let mut vf = None;
    let mut settings = VfSettings::default();
    for part in &info.0 {
        match part {
            VfInfo::Mac(mac) => {
                vf = Some(mac.vf_id);
                settings.mac = mac.mac.first_chunk().copied().map(Mac);
            }
            VfInfo::Vlan(vlan) => {
                let id = u16::try_from(vlan.vlan_id).ok();
                let qos = u8::try_from(vlan.qos).ok();
                settings.vlan = id.zip(qos).map(|(id, qos)| Vlan { id, qos });
            }
            VfInfo::Rate(rate) => {
                settings.min_rate = Some(rate.min_tx_rate);
                settings.max_rate = Some(rate.max_tx_rate);
            }
            VfInfo::Trust(trust) => settings.trust = Some(trust.enabled),
            VfInfo::SpoofCheck(check) => settings.spoofchk = Some(check.enabled),
            VfInfo::LinkState(link) => {
                settings.link_state = match link.state {
                    VfLinkState::Auto => Some(LinkState::Auto),
                    VfLinkState::Enable => Some(LinkState::Enable),
                    VfLinkState::Disable => Some(LinkState::Disable),
                    _ => None,
                };
            }
            _ => {}
        }
    }
    Some((u16::try_from(vf?).ok()?, settings))
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::{Nla, Parseable};

    use super::*;

    /// Each setting comes back from what it is sent as.
    #[test]
    fn settings_are_what_the_kernel_reads() {
        let settings = [
            Setting::Mac("02:00:00:00:00:07".parse().unwrap()),
            Setting::Vlan("100:3".parse().unwrap()),
            Setting::Rate { min: 10, max: 500 },
            Setting::Trust(true),
            Setting::SpoofCheck(false),
            Setting::LinkState(LinkState::Enable),
        ];
        let info = LinkVfInfo(settings.iter().map(|setting| build(5, setting)).collect());
        let mut bytes = vec![0; info.value_len()];
        info.emit_value(&mut bytes);
        // struct ifla_vf_mac: the number and 32 bytes of address.
        assert_eq!(bytes[..14], [40, 0, 1, 0, 5, 0, 0, 0, 2, 0, 0, 0, 0, 7]);
        // struct ifla_vf_vlan: number, VLAN, priority.
        assert_eq!(
            bytes[40..56],
            [16, 0, 2, 0, 5, 0, 0, 0, 100, 0, 0, 0, 3, 0, 0, 0]
        );
        // struct ifla_vf_rate: number, least, most.
        assert_eq!(
            bytes[56..72],
            [16, 0, 6, 0, 5, 0, 0, 0, 10, 0, 0, 0, 244, 1, 0, 0]
        );
        let parts = NlasIterator::new(&bytes).map(|part| VfInfo::parse(&part.unwrap()).unwrap());
        assert_eq!(
            parse(&LinkVfInfo(parts.collect())).unwrap(),
            (
                5,
                VfSettings {
                    mac: Some(Mac([2, 0, 0, 0, 0, 7])),
                    vlan: Some(Vlan { id: 100, qos: 3 }),
                    min_rate: Some(10),
                    max_rate: Some(500),
                    trust: Some(true),
                    spoofchk: Some(false),
                    link_state: Some(LinkState::Enable),
                }
            )
        );
    }

    #[test]
    fn interface_without_virtual_functions() {
        let mut links = Rtnetlink::open().unwrap();
        // The loopback interface has number 1 in every network namespace.
        assert_eq!(links.settings(1).unwrap(), []);
        let error = links.settings(0x7fff_ffff).unwrap_err();
        assert!(error.to_string().contains("No such device"), "{error}");
        let error = links
            .set(1, 0, &Setting::Trust(true))
            .unwrap_err()
            .to_string();
        // Without root it is not even tried.
        assert!(
            error.contains("not supported") || error.contains("not permitted"),
            "{error}"
        );
    }
}
